"""The model and its optimizer: torch alone, no Ray, no MLflow, no direction."""
