"""Views of a dataset: SQL, tables of figures, labelled text in colour, a report."""
