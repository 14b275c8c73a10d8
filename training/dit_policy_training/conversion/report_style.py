"""How the report looks, and what a pointer does in it: inside the file, so that it opens anywhere, offline."""

STYLE = """
:root{color-scheme:light dark;--bg:#f5f5f3;--card:#fff;--ink:#1b1c1e;--soft:#63666b;--line:#e2e2de;--state:#2563ad;
--action:#d2600a;--fill:#7a9cc6;--warn:#92500a;--warnbg:#fdf3df;--warnline:#ecd09a;--good:#1a7346;--goodbg:#e6f4ec;
--bad:#b42318;--badbg:#fdecea;--chip:#ecece8;--idle:rgba(120,120,120,.22)}
@media(prefers-color-scheme:dark){:root{--bg:#131416;--card:#1c1e21;--ink:#e9e9e6;--soft:#9a9ea5;--line:#2e3136;
--state:#6aa5ea;--action:#f29a4c;--fill:#4d6f9c;--warn:#efc277;--warnbg:#2c2415;--warnline:#5b4720;--good:#6fcf97;
--goodbg:#16291f;--bad:#f2897f;--badbg:#351b19;--chip:#2a2d31;--idle:rgba(160,160,160,.22)}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:28px 20px 80px}
h1{font-size:27px;line-height:1.2;margin:0 0 2px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:18px;margin:38px 0 12px;letter-spacing:-.01em}
h3{font-size:14px;margin:0 0 8px}
p{margin:0 0 10px}a{color:inherit}
.soft{color:var(--soft)}.small{font-size:13px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:20px 0 12px}
.tile{padding:12px 14px}.tile b{display:block;font-size:22px;line-height:1.25;letter-spacing:-.02em;font-weight:650}
.tile span{color:var(--soft);font-size:13px}
.check{border-radius:12px;padding:11px 16px;background:var(--goodbg);color:var(--good)}
.check.off{background:var(--badbg);color:var(--bad)}
.cautions{display:grid;gap:8px;padding:0;margin:0;list-style:none}
.cautions li{background:var(--warnbg);border:1px solid var(--warnline);border-radius:10px;padding:10px 14px;
overflow-wrap:anywhere;min-width:0}
.cautions b{color:var(--warn)}.cautions .advice{color:var(--soft)}
.cautions .where{font-size:13px;color:var(--soft);margin-top:2px}
.none{background:var(--goodbg);color:var(--good);border-radius:10px;padding:10px 14px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:12px}
.task{margin:0 0 11px}.task:last-child{margin:0}.task .bar{height:8px;border-radius:4px;background:var(--fill);
margin-top:3px;min-width:3px}
.row{display:flex;justify-content:space-between;gap:12px;align-items:baseline}
.row>:first-child{overflow-wrap:anywhere}.row>:last-child{white-space:nowrap}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(196px,100%),1fr));gap:12px 18px}
.plot .head{font-size:12.5px;line-height:1.35;margin-bottom:3px}
.plot .head span{color:var(--soft);display:block}.plot .head b{font-weight:600;display:block;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}
.box{position:relative;border-bottom:1px solid var(--line)}
svg{display:block;width:100%;height:60px;overflow:visible}
polyline{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.s{stroke:var(--state)}.a{stroke:var(--action)}.fill{fill:var(--fill)}
.mark{stroke:var(--action);stroke-width:1.5;vector-effect:non-scaling-stroke;stroke-dasharray:3 3}
.key{display:inline-block;width:16px;height:3px;border-radius:2px;vertical-align:middle;margin:0 5px 0 12px}
.key.ks{background:var(--state)}.key.ka{background:var(--action)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;white-space:nowrap}
td.n,th.n{text-align:right}tr:last-child td{border-bottom:0}
table.sort th{cursor:pointer}table.sort th:hover{color:var(--ink)}
td.n{white-space:nowrap}td.t{min-width:130px;max-width:360px;overflow-wrap:break-word}
.chip{display:inline-block;background:var(--chip);border-radius:999px;padding:1px 10px;font-size:12.5px;margin:1px 0}
.chip.w{background:var(--warnbg);color:var(--warn)}
details.ep{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0 0 10px}
details.ep>summary{cursor:pointer;padding:11px 16px;display:flex;flex-wrap:wrap;gap:3px 12px;align-items:baseline;
list-style:none}
details.ep>summary::-webkit-details-marker{display:none}
details.ep>summary::before{content:"\\25B8";color:var(--soft)}details.ep[open]>summary::before{content:"\\25BE"}
.inside{padding:2px 16px 16px}
.strip{margin:0 0 8px}.strip .name{font-size:12.5px;color:var(--soft);margin-bottom:2px}
.film{position:relative;border-radius:6px;overflow:hidden;line-height:0}
.film::after{content:"";position:absolute;inset:0;background:repeating-linear-gradient(to right,transparent 0
calc(100%/var(--n) - 2px),var(--card) calc(100%/var(--n) - 2px) calc(100%/var(--n)))}
.film img{width:100%;height:auto;display:block}
.times{display:flex;font-size:11.5px;color:var(--soft);margin:0 0 10px}.times span{flex:1;text-align:center}
.cursor{position:absolute;top:0;bottom:0;left:calc(var(--x)*100%);width:1px;background:var(--ink);opacity:0;
pointer-events:none}
.film .cursor{width:2px;background:#fff;mix-blend-mode:difference}
.on .cursor{opacity:.65}
.bartime{position:relative;height:10px;border-radius:5px;background:var(--chip);overflow:hidden;margin:2px 0 12px}
.bartime i{position:absolute;top:0;bottom:0;background:var(--soft);opacity:.6}
.tools{display:flex;gap:10px;flex-wrap:wrap;margin:0 0 12px;align-items:center}
input,button{font:inherit;font-size:14px;color:inherit;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:5px 11px}button{cursor:pointer}input{min-width:0;width:260px;max-width:100%}
[hidden]{display:none!important}
footer{margin-top:40px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
@media(max-width:640px){main{padding:18px 12px 60px}h1{font-size:22px}.film{overflow-x:auto}
.film img{min-width:640px}.film .cursor{display:none}.times{display:none}.card{padding:13px 14px}
.tiles{grid-template-columns:repeat(2,1fr)}}
@media print{details.ep{break-inside:avoid}.tools{display:none}}
"""

SCRIPT = """
const $=(q,e=document)=>[...e.querySelectorAll(q)];
function at(line,x){let best=null,far=1e9;for(const p of line.points){const d=Math.abs(p.x-x);if(d<far){far=d;best=p}}
return best}
for(const ep of $('details.ep')){const seconds=+ep.dataset.seconds;
 ep.addEventListener('pointermove',e=>{const box=e.target.closest('.box,.film');if(!box)return;
  const r=box.getBoundingClientRect(),x=Math.min(1,Math.max(0,(e.clientX-r.left)/r.width));
  ep.style.setProperty('--x',x);ep.classList.add('on');
  for(const p of $('.plot',ep)){const lo=+p.dataset.lo,hi=+p.dataset.hi,h=60;
   const v=$('polyline',p).map(l=>{const q=at(l,x*240);return (lo+(h-2-q.y)/(h-4)*(hi-lo)).toPrecision(3)});
   $('.head span',p)[0].textContent=v.join(' / ')}
  $('.now',ep)[0].textContent=(x*seconds).toFixed(2)+' s'});
 ep.addEventListener('pointerleave',()=>{ep.classList.remove('on');$('.now',ep)[0].textContent='';
  for(const p of $('.plot',ep))$('.head span',p)[0].textContent=p.dataset.range})}
for(const th of $('table.sort th'))th.addEventListener('click',()=>{const body=th.closest('table').tBodies[0];
 const up=th.dataset.up!=='1';th.dataset.up=up?'1':'';const i=th.cellIndex;
 const key=r=>r.cells[i].dataset.v??r.cells[i].textContent;
 [...body.rows].sort((a,b)=>{const p=key(a),q=key(b),d=isNaN(p-q)?p.localeCompare(q):p-q;return up?d:-d})
 .forEach(r=>body.append(r))});
const find=document.getElementById('find');
find?.addEventListener('input',()=>{const words=find.value.toLowerCase().split(/\\s+/);
 for(const e of $('[data-find]'))e.hidden=!words.every(w=>e.dataset.find.includes(w))});
document.getElementById('all')?.addEventListener('click',()=>{const shut=$('details.ep').some(d=>!d.open);
 for(const d of $('details.ep'))d.open=shut});
const go=()=>{const d=document.getElementById(location.hash.slice(1));if(d?.tagName==='DETAILS'){d.open=true;
 d.scrollIntoView()}};addEventListener('hashchange',go);go();
"""
