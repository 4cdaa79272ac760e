"""Small trainings that show what a method learns, on data that comes with the library: each runs in minutes."""
