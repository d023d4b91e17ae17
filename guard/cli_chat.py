"""`unlearn-guard chat`: a conversation through the guard, in a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from guard.cli_compose import prepare
from guard.cli_session import Session, async_runner, bundle_option, model_options

if TYPE_CHECKING:
    from guard.reload import LiveGuard
    from server.engines.base import Engine


@click.command("chat")
@model_options
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--system", help="A system message.")
@click.option("--show-decisions", is_flag=True, help="Say after each turn what was decided.")
@bundle_option
@click.pass_obj
def chat(
    session: Session,
    /,
    max_tokens: int,
    temperature: float,
    system: str | None,
    show_decisions: bool,
    **flags: Any,
) -> None:
    """Talk to the model through the guard. /exit ends, /new begins a new conversation."""
    from guard.console import note

    session.load(**flags)
    engine, guard, state = prepare(session)
    with async_runner() as runner:
        runner.run(engine.start())
        try:
            runner.run(state.check(engine, guard))
            name = runner.run(engine.models())[0]
            note(f"{name}, guarded by {session.settings.bundle}; /exit ends, /new starts again")
            talk = _Conversation(guard, engine, name, max_tokens, temperature, show_decisions)
            talk.begin(system)
            # Lines are read between runs of the loop, so that Ctrl-C always finds its way.
            while (text := _read_line()) not in (None, "/exit", "/quit"):
                if text == "/new":
                    talk.begin(system)
                elif text:
                    with suppress(KeyboardInterrupt):  # ends the answer, not the conversation
                        runner.run(talk.say(text))
        finally:
            runner.run(engine.close())


class _Conversation:
    """The messages so far, and how to go on."""

    def __init__(
        self,
        guard: LiveGuard,
        engine: Engine,
        model: str,
        max_tokens: int,
        temperature: float,
        show_decisions: bool,
    ) -> None:
        self._guard, self._engine, self._model = guard, engine, model
        self._max_tokens, self._temperature = max_tokens, temperature
        self._show_decisions = show_decisions
        self._messages: list[dict[str, str]] = []

    def begin(self, system: str | None) -> None:
        """Forget what was said."""
        self._messages = [{"role": "system", "content": system}] if system else []

    async def say(self, text: str) -> None:
        """Print the answer as it comes; a turn that fails or is stopped leaves no trace."""
        from guard.chat import ask
        from guard.console import note
        from guard.errors import EngineError, RequestError, StageError

        asked = [*self._messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            turn = await ask(
                self._guard, self._engine, self._model, asked, self._max_tokens, self._temperature
            )
            async for piece in turn.answer:
                click.echo(piece, nl=False)
                said.append(piece)
        except (RequestError, EngineError, StageError) as error:
            note(f"error: {error}")
            return
        finally:
            click.echo()
        self._messages = [*asked, {"role": "assistant", "content": "".join(said)}]
        if self._show_decisions:
            decision = turn.inspection.decision
            hits = ", ".join(f"{h.name} (p {h.p_value:.2g})" for h in decision.targets) or "none"
            note(f"route {decision.route}, targets {hits}")


def _read_line() -> str | None:
    """Read a line; None at the end of the input, or at Ctrl-C on a prompt."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):
            import readline  # noqa: F401  # makes input() a line editor
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return None
