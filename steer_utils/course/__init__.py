"""What the notebooks share: set-up, checks of exercises, figures. Nothing imports it."""
