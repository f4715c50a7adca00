"""The embedded host: T5X's training interface for one machine."""
