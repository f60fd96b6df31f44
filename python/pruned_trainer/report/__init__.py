"""From report.json to people: terminal, page, figures."""
