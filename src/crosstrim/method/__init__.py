"""The method: pure tensor code that knows no model."""
