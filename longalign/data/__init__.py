"""What a run is trained on: the bundled small world, a folder of captioned images, a file of prompts."""
