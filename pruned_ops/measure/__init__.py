"""How many milliseconds layers and models take, and how much of that is launching."""
