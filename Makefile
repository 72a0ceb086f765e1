lab test build:
	python3 run.py $@
.PHONY: lab test build
