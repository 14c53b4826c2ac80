"""What was found: sections below the first screen that neither know HTML nor Markdown."""
