"""What a run reports: summaries, mask metrics, FLOPs."""
