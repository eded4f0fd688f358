"""What a recipe learns from: images that are sampled, scored, paired, or sampled again."""
