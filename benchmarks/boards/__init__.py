"""The parts of a board: measurements, costs, tables and pictures."""
