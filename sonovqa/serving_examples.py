"""What serve.sh prints once its server is ready: how to ask it, each example ready to be pasted."""

from __future__ import annotations

import json

from sonovqa import chat, cli
from sonovqa.serving_plan import Plan


def greeting(plan: Plan) -> str:
    """A ``curl`` call, a Python call and the terminal conversation, each ready to be pasted."""
    return f"""{served_names(plan)}
curl, in bash:
{curl_example(plan)}

Python:
{python_example(plan)}

Conversation in a terminal:
python inference.py --endpoint {plan.url} --endpoint-model {plan.name} --image image.png

{cli.RESEARCH_NOTICE} Ctrl-C stops the server.
"""


def curl_example(plan: Plan) -> str:
    """A question about ``image.png`` with curl, for bash: it puts in the image, and hands the key over in no command line."""
    messages = chat.openai_messages(b"", chat.prompt_for("Q7", ""))
    body = json.dumps({"model": plan.name, "messages": messages, "max_tokens": 128, "temperature": 0})
    body = body.replace("base64,", "base64,$(base64 < image.png | tr -d '\\n')")
    return f"""curl -sS {plan.url}/chat/completions -d @- \\
  -H 'Content-Type: application/json' \\
  -H @<(printf 'Authorization: Bearer %s' "$VLLM_API_KEY") <<JSON
{body}
JSON"""


def python_example(plan: Plan) -> str:
    """The same question with the ``openai`` package."""
    system, user = chat.openai_messages(b"", chat.prompt_for("Q7", ""))
    return f"""import base64, os
from openai import OpenAI
client = OpenAI(base_url="{plan.url}", api_key=os.environ.get("VLLM_API_KEY", "none"))
image = "data:image/png;base64," + base64.b64encode(open("image.png", "rb").read()).decode()
answer = client.chat.completions.create(model="{plan.name}", temperature=0, max_tokens=128, messages=[
    {{"role": "system", "content": {system["content"]!r}}},
    {{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": image}}}},
                                 {{"type": "text", "text": {user["content"][1]["text"]!r}}}]}}])
print(answer.choices[0].message.content)"""


def served_names(plan: Plan) -> str:
    """The names to ask under where there are several; "" for one."""
    if not (plan.weights and plan.weights.adapters):
        return ""
    return f"\nmodels: {', '.join(plan.names)}, and the base as {plan.weights.name}; an example for {plan.name}:"
