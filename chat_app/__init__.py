"""A chat page and an OpenAI-compatible endpoint on one accelerated model.

Modules, each importing only from those before it: `settings` and `answer` (what is asked, what is told: plain data), `slot` (who
waits for whom), `kept` (keys and values between turns), `progress` (one call, token by token), `engine` (answers),
`protocol` (OpenAI's requests and replies), `api` (HTTP for programs), `render` (answers as Markdown, figures and plots), `session`
(what a visitor has), `flow` (what happens when something is asked), `words`, `style` and `page` (Gradio), `__main__` (the command). Importing any of them loads no model.
"""
