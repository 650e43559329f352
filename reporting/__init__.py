"""What is read after training: results and their files, ensembles, reports, figures."""
