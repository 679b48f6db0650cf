# `mdm-asr serve` with the checkpoint of the package in int8: docs/serving.md.

FROM python:3.12-slim AS export
COPY . /src
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "/src[export]"
RUN mdm-asr export --format onnx --output /models/mdm-asr-tiny-en --int8
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim
COPY --from=export /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[onnx,serve]"
COPY --from=export /models /models
RUN useradd --system --uid 10001 --no-create-home mdm-asr
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# SIGTERM finishes what runs: give `docker stop` the time for it, with --timeout.
ENTRYPOINT ["mdm-asr", "serve", "--model", "/models/mdm-asr-tiny-en", "--host", "0.0.0.0"]
