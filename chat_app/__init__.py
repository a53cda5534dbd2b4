"""A chat page and an OpenAI-compatible endpoint on one accelerated model.

Rooms, each importing only from those before it: `settings` and `answer` (what is asked, what is told: plain data), `engine` (one
slot, conversations, cancellation), `api` (HTTP for programs), `render` (answers as Markdown, figures and plots), `page` (Gradio),
`__main__` (the command). Importing any of them loads no model.
"""
