"""What a trained model is worth: where it calls, what it leaks, what it says, what it understands."""
