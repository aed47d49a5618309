"""The synthetic scenes, single and in pairs."""
