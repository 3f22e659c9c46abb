"""Methods that exist only to be compared with: each writes ELUE's test files."""
