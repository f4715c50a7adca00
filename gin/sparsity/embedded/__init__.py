"""Model and run files of the embedded host; they run on T5X too."""
