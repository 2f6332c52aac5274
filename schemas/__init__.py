"""The contract on disk: column schemas, code tables, the manifest, file layout, and the SQL views over a dataset."""
