"""Questions to a dataset: a DuckDB connection, tables of figures, labelled text in colour."""
