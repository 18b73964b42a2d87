"""The application: all routes behind all guards. How it starts and ends is server.py's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from miniglm import __version__
from miniglm.serving.api import create_router, install_errors
from miniglm.serving.book import BookService
from miniglm.serving.guards import Body, Clients, Key, Measure, Origins, State
from miniglm.serving.metrics import Metrics
from miniglm.serving.schema import ApiError
from miniglm.serving.service import LocalService, Service
from miniglm.serving.settings import Limits


def create_app(
    service: Service,
    limits: Limits,
    state: State,
    *,
    run: Path | None = None,
    api_key: str | None = None,
    loopback: bool = True,
    cors: Sequence[str] = (),
    log_prompts: bool = False,
    page: bool = True,
    book: BookService | None = None,
) -> FastAPI:
    """All routes behind all guards.

    Args:
        run: the run folder whose report is shown and whose `feedback.jsonl` is appended to.
        page: with the page, which takes seconds to load.
        book: answers the page's questions and the API's chats from the book, unless they want the model's own answer.
    """
    local = service if isinstance(service, LocalService) else None
    metrics = Metrics(local.worker if local else None)
    app = FastAPI(title="miniGLM", version=__version__, docs_url=None, redoc_url=None)
    install_errors(app)
    api: list[APIRoute] = []
    if local:
        router = create_router(local, limits, metrics, log_prompts=log_prompts, book=book)
        api = [route for route in router.routes if isinstance(route, APIRoute)]
        app.router.routes += api  # an included router looks for its route twice in each request

    @app.get("/healthz", include_in_schema=False)
    async def health() -> Response:
        return JSONResponse({"status": "draining" if state.draining else "ok"}, 503 if state.draining else 200)

    @app.get("/metrics", include_in_schema=False)
    async def numbers() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/report", include_in_schema=False)
    async def report() -> Response:
        file = None if run is None else run / "report" / "report.html"
        if file is None or not file.is_file():
            raise ApiError(404, "没有评测报告：运行 miniglm evaluate RUN 会写一份")
        return FileResponse(file)

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
    async def nothing(request: Request) -> Response:
        for route in api:
            if route.matches(request.scope)[0] != Match.NONE:  # the path is there, but not for this method
                raise ApiError(
                    405, f"这个地址不接受 {request.method}", headers={"Allow": ", ".join(route.methods or ())}
                )
        raise ApiError(404, "没有这个地址" if local else "这里只有页面；模型在 --backend 给的服务那里")

    if page:
        from miniglm.serving.about import facts_of
        from miniglm.serving.page import mount_page

        feedback = None if run is None else run / "feedback.jsonl"
        mount_page(app, service, facts_of(run, name=service.model_id), feedback=feedback, limits=limits, book=book)
    # The last one added sees a request first.
    app.add_middleware(Body, limits=limits)
    app.add_middleware(Clients, limits=limits)
    if api_key is not None:
        app.add_middleware(Key, key=api_key, limits=limits)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Origins, allowed=cors, loopback=loopback)
    app.add_middleware(Measure, state=state, metrics=metrics)
    return app
