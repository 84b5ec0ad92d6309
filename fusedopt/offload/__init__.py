"""Where state lives, and who steps it when."""
