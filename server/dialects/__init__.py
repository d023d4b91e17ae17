"""Other ways to ask for a chat completion: Anthropic's messages and OpenAI's responses.

A dialect's request is parsed strictly and becomes the body of one chat completion *before* the
guard sees it. So what is judged is what is sent, the engine only ever gets chat completions, and
flagged and plain requests go the same way.
"""
