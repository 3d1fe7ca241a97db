"""What is predicted, and what is counted: batches and labels, documents kept apart, the output head, metrics."""
