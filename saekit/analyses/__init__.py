"""What dictionaries, neurons and networks are good for, measured: one analysis a file, each with the law that it obeys."""
