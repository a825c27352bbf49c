"""From committed rows to docs/results.md: ``rows`` reads them, ``statistics`` compares, the others write a section each."""
