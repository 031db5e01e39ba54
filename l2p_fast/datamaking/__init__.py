"""From words to training images: a taxonomy, prompts, a filter, images of any pipeline, and a page about them."""
