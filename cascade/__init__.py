"""Generation with delegation, and the evaluation of a trained model."""
