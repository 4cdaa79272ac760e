"""The algebra: masks, selections, attention, recurrences, statistics. Imports nothing above it."""
