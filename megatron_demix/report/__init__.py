"""The report: one self-contained HTML page that says what the mixture is, whether it won, and how sure that is."""
