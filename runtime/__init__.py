"""What any script needs: devices, processes, errors, files, the hub. Knows no BERT, task or run."""
