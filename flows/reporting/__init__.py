"""A report, from its rows to the page, the terminal's tables and the charts."""
