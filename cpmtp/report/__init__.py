"""The report: document, sections, pilot plan, figures."""
