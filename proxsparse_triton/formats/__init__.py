"""What a run writes and reads back: the pruned model, the masks, the manifest; and the check that they are right."""
