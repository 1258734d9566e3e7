// Updates the HTML that is shown to the component's value. The elements of jobs are kept, so that videos play on,
// open details stay open, and the keyboard focus stays where it was.
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
const live = element.querySelector('.live');
const scrollTo = (id) => document.getElementById(id).scrollIntoView({ behavior: calm ? 'auto' : 'smooth', block: 'nearest' });
let clear = () => {}; // undoes what `mark` did
const keyOf = (node) => node.dataset?.job || node.dataset?.do;

function update(old, fresh) {
	if (old.nodeName !== fresh.nodeName) {
		old.replaceWith(fresh);
	} else if (old.nodeType === Node.TEXT_NODE) {
		if (old.data !== fresh.data) old.data = fresh.data;
	} else {
		for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== 'open') old.removeAttribute(name);
		for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
		updateChildren(old, fresh);
	}
}

function updateChildren(parent, fresh) {
	const keys = new Set([...fresh.childNodes].map(keyOf));
	const kept = new Map();
	for (const node of [...parent.childNodes]) {
		if (keyOf(node) && !keys.has(keyOf(node))) node.remove();
		else if (keyOf(node)) kept.set(keyOf(node), node);
	}
	let next = parent.firstChild;
	for (const node of [...fresh.childNodes]) {
		const same = keyOf(node) ? kept.get(keyOf(node)) : next && !keyOf(next) ? next : null;
		if (!same) {
			parent.insertBefore(node, next);
		} else {
			if (same === next) next = next.nextSibling;
			else parent.insertBefore(same, next);
			update(same, node);
		}
	}
	while (next) {
		const last = next;
		next = next.nextSibling;
		last.remove();
	}
}

function render() {
	const focused = live.contains(document.activeElement) ? document.activeElement : null;
	const row = focused?.closest('[data-job]');
	const following = row?.nextElementSibling || row?.previousElementSibling;
	clear();
	const template = document.createElement('template');
	template.innerHTML = props.value || '';
	updateChildren(live, template.content);
	if (focused && document.activeElement !== focused) {
		const near = [row, following, live].find((each) => each?.isConnected);
		(focused.isConnected ? focused : near.querySelector('button, a'))?.focus({ preventScroll: true });
	}
	const target = live.querySelector('[data-scroll]');
	if (target) scrollTo(target.dataset.scroll);
	const wrong = live.querySelector('[data-field]');
	if (wrong) mark(wrong);
}

function mark(notice, tries = 50) { // opens the group of an error's field, and moves the error there
	const id = notice.dataset.field;
	const field = document.getElementById(id);
	const input = field?.querySelector('textarea, input:not([type=file]), button');
	if (!field?.offsetParent) document.querySelector(`[id="${notice.dataset.group}"] > .label-wrap:not(.open)`)?.click();
	if (!(input && field.offsetParent) && tries && notice.isConnected) return setTimeout(() => mark(notice, tries - 1), 100);
	if (!input) return notice.removeAttribute('data-field'); // no field to move it to
	const error = Object.assign(document.createElement('p'), { className: 'field-error', id: `${id}-error`, textContent: notice.textContent });
	field.append(error);
	input.setAttribute('aria-invalid', 'true');
	input.setAttribute('aria-describedby', error.id);
	input.focus({ preventScroll: true });
	field.scrollIntoView({ behavior: calm ? 'auto' : 'smooth', block: 'center' });
	const types = ['input', 'change', 'drop'];
	clear = () => {
		error.remove();
		notice.remove();
		input.removeAttribute('aria-invalid');
		input.removeAttribute('aria-describedby');
		for (const type of types) field.removeEventListener(type, clear, true);
		clear = () => {};
	};
	for (const type of types) field.addEventListener(type, clear, true);
}

// A double click counts as one click, and so does a held key
const area = element.closest('.go') ?? element;
area.addEventListener('click', (event) => { if (event.detail > 1) event.stopPropagation(); }, true);
area.addEventListener('keydown', (event) => { if (event.repeat && event.target.closest('button')) event.preventDefault(); }, true);
element.addEventListener('click', (event) => {
	const button = event.target.closest('button[data-do]:not([aria-disabled="true"])');
	if (!button) return;
	const what = button.dataset.do;
	if (what === 'play') {
		for (const video of element.querySelectorAll('video')) {
			video.currentTime = 0;
			video.play();
		}
		return;
	}
	if (what === 'delete' && button.textContent === 'Delete') { // it cannot be undone: ask first
		button.textContent = 'Delete it?';
		setTimeout(() => { button.textContent = 'Delete'; }, 4000);
		return;
	}
	if (what === 'reload' || what === 'extend') scrollTo('head');
	if (what === 'compare') setTimeout(() => scrollTo('compare'), 1000);
	trigger('click', { do: what, id: button.dataset.id });
});
watch('value', render);
render();
