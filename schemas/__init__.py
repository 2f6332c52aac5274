"""The contract on disk: column schemas, code tables, the manifest, the layout of files, and SQL views."""
