"""From report.json to what people read: terminal, page, figures."""
