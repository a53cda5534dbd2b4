"""A chat page and an OpenAI-compatible endpoint on one accelerated model.

Modules, each importing only from those before it: `settings` and `answer` (what is asked, what is told: plain data), `slot` (who
waits for whom), `kept` (keys and values between turns), `progress` (one call, token by token), `engine` (answers),
`protocol` (OpenAI's requests and replies), `api` (HTTP for programs), `render` (answers as Markdown, figures and plots), `session`
(what a visitor has), `flow` (what happens when something is asked), `words`, `style` and `page` (Gradio), `__main__` (the command), `deployment`
(replicas with Ray Serve). Importing any of them loads no model.
"""

import os

# Read when torch is imported: for how long its threads turn round before they sleep where they wait for each other. By default it is some
# milliseconds, and a browser on the same processors makes a time slice of each such wait.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
