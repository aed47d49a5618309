"""Training data: the bundled synthetic scenes; captioned images in folders, tables and tar files; prompts."""
