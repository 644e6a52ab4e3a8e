# What people and CI run; `make` alone lists it.

# One profile for the demo, the tests and the lints, so that everything is built once. `dev` is built in a third of the time
# and checks arithmetic; `make demo PROFILE=fast` shows optimised code.
PROFILE ?= dev
PYTHON ?= python3
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help demo test tools check bench fuzz chaos requirements

help: ## This list
	@echo "Disco, a service-mesh control plane. What you can make:"
	@echo
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do \
	  printf '  make %-8s %s\n' "$$name" "$$what"; \
	done
	@echo
	@echo "Needed: Rust 1.95 (https://rustup.rs), gcc, make, Python 3.10. No root: the rest goes to .tools/."

demo: requirements ## The main job in 15 seconds; KEEP=1 leaves it running
	@$(PYTHON) tests/tools/install.py envoy
	@echo "Building; the first time takes a minute or two"
	@$(CARGO) build --profile $(PROFILE) --bins --examples
	@$(CARGO) run --quiet --profile $(PROFILE) --example demo -- $(if $(KEEP),--keep)

test: requirements tools ## All tests, with real Envoy and real gRPC clients
	@echo "Building and testing; the first time takes two or three minutes"
	@# An example that has tests of its own is otherwise built as these only.
	@$(CARGO) build --profile $(PROFILE) --bins --examples
	@$(CARGO) test --profile $(PROFILE)
	@echo "All tests passed"

tools: requirements ## Install Envoy, the databases and the gRPC clients into .tools/
	@$(PYTHON) tests/tools/install.py

check: requirements ## Formatting, lints and documentation, as CI checks them
	$(CARGO) fmt --check
	$(CARGO) clippy --profile $(PROFILE) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --profile $(PROFILE) --no-deps --quiet

# A part of it: `make bench BENCH=fanout CASE=churn`, or `BENCH="scale propagation"`. The table and the plot are of the whole.
BENCH ?= registrations scale propagation fanout
CASE ?=
bench: requirements ## All benchmarks, with a table and a plot; at most 40 minutes. BENCH=fanout CASE=churn: a part
	@$(PYTHON) tests/tools/install.py envoy
	@$(CARGO) bench --profile fast --no-run
	@for bench in $(BENCH); do \
	  case $$bench in \
	    scale) set -- --file;; \
	    fanout) set -- $(if $(CASE),--only=$(CASE),--json=benches/fanout.json);; \
	    *) set --;; \
	  esac; \
	  PYTHON=$(PYTHON) $(CARGO) bench --profile fast --bench $$bench -- "$$@" || exit; \
	  [ $$bench != fanout ] || [ -n "$(CASE)" ] || $(PYTHON) benches/plot.py benches/fanout.json benches/fanout.svg || exit; \
	done

# What is found is kept in src/xds/fuzz/corpus, which `make test` tries too.
SECONDS ?= 150
fuzz: requirements ## Fuzz the xDS decoders and state machines; four targets, SECONDS=150 each
	@DISCO_FUZZ_SECONDS=$(SECONDS) nice -n 19 $(CARGO) test --profile $(PROFILE) --lib xds::fuzz -- --nocapture --test-threads 1

# In namespaces of its own, so that it needs no root and cuts nobody's network. Linux, with iproute2. DISCO_CHAOS=TEXT
# for those faults only whose line in the table has the text.
chaos: requirements ## Kill, freeze and cut everything in turn, under calls; ten minutes, with a table
	@$(PYTHON) tests/tools/install.py envoy etcd
	@$(CARGO) build --profile $(PROFILE) --bins --examples
	@$(CARGO) test --profile $(PROFILE) --test it --no-run
	@unshare --user --map-root-user --net --mount sh -c 'mount -t tmpfs run /run && ip link set lo up && \
	  exec $(CARGO) test --offline --profile $(PROFILE) --test it chaos -- --ignored --nocapture'

requirements:
	@missing=; \
	need() { command -v "$$1" >/dev/null || { echo "$$1 is missing: $$2"; missing=yes; }; }; \
	need $(CARGO) "install Rust 1.95 or newer, see https://rustup.rs"; \
	need cc "install a C compiler and its headers, e.g. apt-get install gcc libc6-dev"; \
	need $(PYTHON) "install Python 3.10 or newer, e.g. apt-get install python3"; \
	[ -z "$$missing" ]
