"""Text, tables and progress on terminals and in logs."""
