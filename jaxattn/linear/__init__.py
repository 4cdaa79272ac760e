"""Linear and recurrent attention."""
