"""The rewards HPSv2 and HPSv2.1."""
