"""The page of demo.py: models that answer in turns, what their cards show, and the page in Gradio."""
