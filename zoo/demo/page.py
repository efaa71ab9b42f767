"""The page in the browser: Gradio components around the plain functions of this folder. Nothing leaves the machine."""

from __future__ import annotations

import html
import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact

CSS = """
.gradio-container { max-width: 1080px !important; margin: auto !important; }
.complaint { border-left: 4px solid #c62828; padding: 0.4em 0.8em; }
footer { display: none !important; }
"""
BUTTONS = ["download", "fullscreen"]  # of pictures; the usual third one uploads them
EXAMPLE = "TTCTCATTGCAAGACTGACAGGTAAGTATCTTGGTCCATGACTTGCAGGTTCATGCAAAT"


def gradio() -> Any:
    """The gradio module, told to report nothing before it is imported.

    Raises:
        ZooError: it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ZooError("the page is made with Gradio, which is not installed: pip install 'seqzoo[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def open_demo(artifact: Artifact, tokenizer: str = "", data: str = "", split: str = "test", root: str = "") -> Any:
    """The object behind the page of an artifact.

    Args:
        artifact: loaded.
        tokenizer: visual tokenizer of a generator's ids; "" takes the one it was trained on.
        data, split, root: clips that a next-block model continues.

    Raises:
        ZooError: a model without a page, or one that lacks a part.
    """
    from zoo.models.mqt import MQT
    from zoo.models.nbp import NBP
    from zoo.models.video import VideoModel
    from zoo.models.visual import VisualModel

    model = artifact.model
    if data and not isinstance(model, NBP):
        raise ZooError(f"--data is for next-block models, not for a {type(model).__name__}")
    if isinstance(model, NBP):
        from zoo.demo.clips import ClipGeneratorDemo, load_source

        return ClipGeneratorDemo(artifact, tokenizer, load_source(data, split, root) if data else None)
    if isinstance(model, VideoModel):
        from zoo.demo.clips import ClipTokenizerDemo

        return ClipTokenizerDemo(artifact)
    if isinstance(model, VisualModel):
        from zoo.demo.pictures import PictureTokenizerDemo

        return PictureTokenizerDemo(artifact)
    if isinstance(model, MQT):
        from zoo.demo.questions import QuestionDemo

        return QuestionDemo(artifact)
    if hasattr(artifact.config, "codes") and hasattr(artifact.config, "classes"):
        from zoo.demo.pictures import PictureGeneratorDemo

        return PictureGeneratorDemo(artifact, tokenizer)
    if hasattr(model, "forward_features"):
        from zoo.demo.dna import DnaDemo

        return DnaDemo(artifact)
    raise ZooError(f"there is no page for a {type(model).__name__}")


def build(demo: Any, title: str, about: str = "") -> Any:
    """The page of *demo*, an object of `open_demo`."""
    gr = gradio()
    with gr.Blocks(title=f"{title} · seqzoo", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n{about}")
        complaint = gr.HTML(elem_id="complaint")
        PAGES[type(demo).__name__](gr, demo, complaint)
    return page


def guarded(function: Callable[..., Sequence[Any]], results: int) -> Callable[..., list[Any]]:
    """*function* with one result more: an empty line, or the sentence of its `ZooError` and nothing else."""

    def run(*given: Any) -> list[Any]:
        try:
            return [*function(*given), ""]
        except ZooError as error:
            return [None] * results + [f'<p class="complaint" role="alert">{html.escape(str(error))}</p>']

    return run


def _wire(
    gr: Any, triggers: list[Any], function: Callable[..., Any], given: list[Any], results: list[Any], line: Any
) -> None:
    gr.on(triggers, guarded(function, len(results)), given, [*results, line], api_visibility="private",
          concurrency_limit=1, show_progress_on=results[:1])  # fmt: skip


def _number(value: Any) -> int:
    """A number field that was emptied counts as 0."""
    return int(value or 0)


def _dna(gr: Any, demo: Any, complaint: Any) -> None:
    room = max((getattr(demo.artifact.model, "max_len", None) or len(EXAMPLE) + 2) - 2, 4)  # and two special tokens
    with gr.Row():
        text = gr.Textbox(label="DNA or FASTA", value=EXAMPLE[:room], lines=4, max_lines=12, scale=3, elem_id="dna")
        file = gr.File(label="or a FASTA file", type="filepath", scale=1, height=140)
    mates = gr.Textbox(label="Second sequences", lines=3, visible=demo.pairs)
    with gr.Row():
        read = gr.Button("Read", variant="primary", elem_id="read")
        mutate = gr.Button("Substitute every base", visible=demo.kind != "token" and not demo.pairs, elem_id="mutate")
    table = gr.Dataframe(label="Predictions", interactive=False, elem_id="table")
    picture = gr.Image(buttons=BUTTONS, label="Along the first sequence", interactive=False, elem_id="picture")
    note = gr.Markdown(elem_id="note")

    def reading(*given: Any) -> list[Any]:
        found = demo.read(*given)
        return [{"headers": found.header, "data": found.rows}, found.picture, found.note]

    _wire(gr, [read.click], reading, [text, file, mates], [table, picture, note], complaint)
    _wire(gr, [mutate.click], demo.mutate, [text, file], [picture, note], complaint)


def _picture_tokenizer(gr: Any, demo: Any, complaint: Any) -> None:
    with gr.Row():
        image = gr.Image(buttons=BUTTONS, label="Picture", type="pil", image_mode=None, sources=["upload", "clipboard"],
                         elem_id="input")  # fmt: skip
        seen = gr.Image(buttons=BUTTONS, label="What the model sees", interactive=False, elem_id="seen")
        made = gr.Image(buttons=BUTTONS, label="What it makes of the tokens", interactive=False, elem_id="picture")
    ordered = demo.ordered
    tokens = gr.Slider(1, demo.most, demo.most, step=1, label="Tokens", visible=ordered, elem_id="tokens")
    with gr.Row(visible=ordered):
        steps = gr.Slider(1, 50, 20, step=1, label="Steps of the decoder")
        guidance = gr.Slider(1, 15, 7.5, step=0.5, label="Guidance")
        seed = gr.Number(0, label="Seed of the noise", precision=0)
    again = gr.Button("Reconstruct", variant="primary", elem_id="read")
    note = gr.Markdown(elem_id="note")

    def reconstruct(image: Any, tokens: Any, steps: Any, guidance: Any, seed: Any) -> tuple[Any, ...]:
        return demo.reconstruct(image, tokens, steps, guidance, _number(seed))

    _wire(gr, [image.upload, again.click, tokens.release], reconstruct, [image, tokens, steps, guidance, seed],
          [seen, made, note], complaint)  # fmt: skip


def _picture_generator(gr: Any, demo: Any, complaint: Any) -> None:
    with gr.Row():
        name = gr.Dropdown(demo.classes, value=demo.classes[0], label="Class", elem_id="class")
        number = gr.Slider(1, 8, 4, step=1, label="Pictures")
        seed = gr.Number(0, label="Seed", precision=0)
    with gr.Row():
        guidance = gr.Slider(0, 10, 3, step=0.5, label="Guidance")
        steps = gr.Slider(1, 32, 8, step=1, label="Passes", visible=demo.stepwise)
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", visible=not demo.stepwise)
    go = gr.Button("Generate", variant="primary", elem_id="read")
    picture = gr.Image(buttons=BUTTONS, label="Pictures", interactive=False, elem_id="picture")
    note = gr.Markdown(elem_id="note")

    def sample(name: Any, number: Any, guidance: Any, steps: Any, temperature: Any, seed: Any) -> tuple[Any, ...]:
        return demo.sample(name, number, guidance, steps, temperature, _number(seed))

    _wire(gr, [go.click], sample, [name, number, guidance, steps, temperature, seed], [picture, note], complaint)


def _clip_generator(gr: Any, demo: Any, complaint: Any) -> None:
    with gr.Row(visible=demo.continues):
        file = gr.File(label="Clip to continue (GIF, video, picture)", type="filepath", height=140, elem_id="input")
        with gr.Column():
            sample = gr.Slider(0, max(demo.samples - 1, 1), 0, step=1, label="or number of a clip of the data set",
                               visible=demo.samples > 0, elem_id="sample")  # fmt: skip
            given = gr.Slider(1, max(demo.latent_frames - 1, 2), min(2, demo.latent_frames - 1), step=1,
                              label="Latent frames that are given", elem_id="given")  # fmt: skip
    with gr.Row():
        name = gr.Dropdown(demo.classes, value=demo.classes[0] if demo.classes else None, label="Class",
                           visible=bool(demo.classes))  # fmt: skip
        guidance = gr.Slider(1, 10, 1, step=0.5, label="Guidance", visible=bool(demo.classes))
        temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
        fps = gr.Slider(1, 30, 8, step=1, label="Frames a second")
        seed = gr.Number(0, label="Seed", precision=0)
    go = gr.Button("Generate", variant="primary", elem_id="read")
    clip = gr.Image(buttons=BUTTONS, label="Clip", interactive=False, type="filepath", elem_id="picture")
    note = gr.Markdown(elem_id="note")

    def generate(file: Any, sample: Any, given: Any, name: Any, temperature: Any, guidance: Any, seed: Any, fps: Any
                 ) -> tuple[Any, ...]:  # fmt: skip
        return demo.generate(file, sample, given, name or "", temperature, guidance, _number(seed), fps)

    _wire(gr, [go.click], generate, [file, sample, given, name, temperature, guidance, seed, fps], [clip, note],
          complaint)  # fmt: skip


def _clip_tokenizer(gr: Any, demo: Any, complaint: Any) -> None:
    with gr.Row():
        file = gr.File(label="Clip (GIF, video, or a picture)", type="filepath", height=140, elem_id="input")
        fps = gr.Slider(1, 30, 8, step=1, label="Frames a second")
    go = gr.Button("Reconstruct", variant="primary", elem_id="read")
    clip = gr.Image(buttons=BUTTONS, label="The clip and its reconstruction", interactive=False, type="filepath",
                    elem_id="picture")  # fmt: skip
    note = gr.Markdown(elem_id="note")
    _wire(gr, [file.upload, go.click], demo.reconstruct, [file, fps], [clip, note], complaint)


def _questions(gr: Any, demo: Any, complaint: Any) -> None:
    with gr.Row():
        image = gr.Image(
            buttons=BUTTONS, label="Picture", type="filepath", sources=["upload", "clipboard"], elem_id="input"
        )
        with gr.Column():
            question = gr.Textbox(label="Question", elem_id="question")
            tokens = gr.Slider(1, max(demo.most, 2), demo.most or 1, step=1, label="Visual tokens",
                               visible=bool(demo.most), elem_id="tokens")  # fmt: skip
            ask = gr.Button("Ask", variant="primary", elem_id="read")
            answer = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
            note = gr.Markdown(elem_id="note")

    def answered(image: Any, question: Any, tokens: Any) -> tuple[Any, ...]:
        return demo.answer(image, question or "", int(tokens) if demo.most else 0)

    _wire(gr, [ask.click, question.submit, tokens.release], answered, [image, question, tokens], [answer, note],
          complaint)  # fmt: skip


PAGES: dict[str, Callable[[Any, Any, Any], None]] = {
    "DnaDemo": _dna,
    "PictureTokenizerDemo": _picture_tokenizer,
    "PictureGeneratorDemo": _picture_generator,
    "ClipGeneratorDemo": _clip_generator,
    "ClipTokenizerDemo": _clip_tokenizer,
    "QuestionDemo": _questions,
}


def serve(page: Any, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = False) -> str:
    """Start serving in the background and return the address; port 0 takes a free one.

    Nothing is shared or reported, the fonts are the browser's own, and no file outside the uploads can be asked for.

    Raises:
        ZooError: the port is taken, or the address is not one of this machine.
    """
    gr = gradio()
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            port = probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise ZooError(f"cannot serve on {host}:{port} ({what}): choose another --port, or 0 for a free one") from None
    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=host, server_port=port, inbrowser=open_browser, share=False, quiet=True, show_error=True,
        prevent_thread_lock=True, footer_links=[], ssr_mode=False, enable_monitoring=False, max_file_size="256mb",
        theme=theme, css=CSS,
    )  # fmt: skip
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{shown}:{port}/"
