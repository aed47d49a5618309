"""What a run is trained on: the bundled small world, captioned images in folders, tables and tar files, prompts."""
