# make demo: a video of five tasks, on any machine, and frames of all in result/demo.png.
# make test: all tests that need no GPU; make test-quick: those that are not marked slow, in less than a minute.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python generate_video.py --model_id tiny

.PHONY: demo serve docs docs-serve test test-quick test-extended lint bench bench-gpu bench-check quality clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-web: $(VENV)/installed requirements-web.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-web.txt
	touch $@

$(VENV)/installed-docs: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-web.txt requirements-docs.txt requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) --task_type reference_to_video --ref_imgs assets/fox.png,assets/lantern.png --duration 2 \
	    --prompt "A fox carries a red lantern through the snow"
	$(RUN) --task_type single_shot_extension --input_video assets/boat.mp4 --include_input \
	    --prompt "The boat sails on into the dusk"
	$(RUN) --task_type shot_switching_extension --input_video assets/boat.mp4 --duration 2 \
	    --prompt "[ZOOM_IN_CUT] The sail of the boat, lit by the sun"
	$(RUN) --task_type talking_avatar --input_image assets/portrait.png --input_audio assets/speech.mp3 \
	    --prompt "A woman in a red coat talks to the camera"
	$(RUN) --task_type t2v --num_frames 49 --prompt "FPS-24, A cat wearing sunglasses works as a lifeguard at a pool"
	$(VENV)/bin/python benchmarks/frames.py result/reference_to_video result/single_shot_extension \
	    result/shot_switching_extension result/talking_avatar result/t2v --out result/demo.png

# make serve, or with flags: make serve FLAGS="--model_id tiny --port 9000"
serve: $(VENV)/installed-web
	$(VENV)/bin/python generate_video.py --serve $(FLAGS)

# into build/site; a link to nothing is an error
docs: $(VENV)/installed-docs
	$(VENV)/bin/zensical build --strict

docs-serve: $(VENV)/installed-docs
	$(VENV)/bin/zensical serve

# pytest starts a worker for each core
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test test-quick: export OMP_NUM_THREADS ?= 1
test: $(VENV)/installed-dev
	$(PYTEST)

test-quick: $(VENV)/installed-dev
	$(PYTEST) -m "not slow and not extended and not gpu"

test-extended: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -m extended

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/run_all.py cpu --out $(OUT)/cpu

# on scenes of the drawn world that the built-in model was not trained on; hours
quality: $(VENV)/installed
	$(VENV)/bin/python benchmarks/quality.py --out result/quality --switches --scenes 20
	$(VENV)/bin/python benchmarks/quality.py --out result/quality
	$(VENV)/bin/python benchmarks/quality.py --out result/quality --page docs/quality.md

# with a Python that has all packages already: make bench-gpu PY=python3 OUT=results-here
PY ?= $(VENV)/bin/python
MINUTES ?= 6
OUT ?= result/bench
bench-gpu: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/installed)
	$(PY) benchmarks/run_all.py gpu --minutes $(MINUTES) --out $(OUT)/gpu

# what make bench or make bench-gpu has found, next to the committed results of the same device
bench-check: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/installed)
	for file in $(OUT)/*/results.jsonl; do $(PY) benchmarks/check.py $$file || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
